"""The release that depends on nobody: a process beside each run lets the guest go, whatever becomes of the run.

- `guard`: the owner's end: start it, tell it what to watch, take the release over from it;
- `start`, `process`: the process itself;
- `watching`: what makes it give a run up; `giving_up`: in which order that is done;
- `admission`: who may be connected to the guest's disks; `clients`: who is;
- `own_unit`: its way out of the owner's control group.
"""
