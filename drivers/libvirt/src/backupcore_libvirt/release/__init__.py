"""The release that depends on nobody: a process beside each run lets the guest go, whatever becomes of the run.

- `guard`: the owner's end: start it, tell it what to watch, take the release over from it;
- `start`, `process`: the process itself, with its one thread (`loop`), its line to the owner (`owner_line`) and its
  socket (`control`);
- `watching`: what makes it give a run up; `giving_up`: in which order that is done;
- `rest`: a guest that the run has brought to rest goes on;
- `admission`: who may be connected to the guest's disks; `clients`: who is;
- `own_unit`: its way out of the owner's control group.
"""
