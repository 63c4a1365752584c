"""How often a night logs in to the host that keeps the backups: a firewall may count that."""

from __future__ import annotations

import pytest
from kept_in_files import WEB

from lab.servers import sshd


@pytest.mark.soak
def test_a_command_logs_in_once_and_a_night_with_a_flatten_a_few_times(site, tmp_path):
    (tmp_path / "keys").mkdir()
    with sshd(tmp_path / "keys") as server:
        site.configure(
            datastores=(
                f'[datastores.nas]\ndriver = "rsync"\ntarget = "{server.user}@127.0.0.1:{site.store}"\n'
                f'ssh = "ssh -F none"\nport = {server.port}\nidentity_file = "{server.identity}"\n'
                f'known_hosts_file = "{server.known_hosts}"\n'
            )
        )

        def logins(*arguments: str) -> int:
            before = server.logins
            done = site.run(*arguments)
            assert done.code == 0, done.err
            return server.logins - before

        assert logins("backup", "web1") == 1
        site.write(WEB, "vda", 70_000, b"night 2" * 5_000)
        assert site.run("vm", "updateconf", "web1", "--keep-last", "1").code == 0
        assert logins("backup", "web1") <= 3, "the backup; the flatten, which looks, stores, proves and deletes"
        assert logins("image", "verify", "1") == 1
        assert logins("datastore", "check", "nas") == 1
