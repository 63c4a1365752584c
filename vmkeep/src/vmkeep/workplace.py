"""What a verb works with on this host, opened from the configuration when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path

from backupcore.context import Context, Progress
from backupcore.datastore import Datastore
from backupcore.errors import ConfigError, NotFound
from backupcore.hypervisor import Hypervisor, VMState, open_hypervisor
from backupcore.model import VM
from backupcore.plugins import loading
from vmkeep import folders, installation, interrupt
from vmkeep.catalog import ownership
from vmkeep.catalog.database import Catalog
from vmkeep.config import Config
from vmkeep.installation import Installation
from vmkeep.same_place import SamePlace

__all__ = ["Workplace"]


class Workplace:
    """The hypervisor, the catalog and the datastores of a configuration, each opened when it is first used."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._same: dict[str, SamePlace] = {}

    @property
    def state(self) -> Path:
        """The folder of the catalog, the locks and the runs."""
        return self.config.host.state

    @cached_property
    def hypervisor(self) -> Hypervisor:
        """The hypervisor plugin. ConfigError if it is not installed."""
        host = self.config.host
        return open_hypervisor(host.hypervisor, uri=host.uri, scratch=host.scratch)

    @cached_property
    def installation(self) -> Installation:
        """Who works here; the state folder gets an ID if it has none, or is a copy of another machine's."""
        host, found = self.config.host, self._opened
        return installation.establish(
            self.state,
            here=installation.machine(),
            chosen=host.installation,
            config=self.config.path,
            carried=lambda: ownership.carried(found),
        )

    @cached_property
    def installation_if_any(self) -> Installation:
        """Who works here as far as that is decided: for verbs that promise to touch nothing."""
        return installation.known(self.state, here=installation.machine(), chosen=self.config.host.installation)

    @cached_property
    def catalog(self) -> Catalog:
        """The catalog, made if it does not exist."""
        ownership.settle(self._opened, self.installation)
        return self._opened

    @cached_property
    def _opened(self) -> Catalog:
        # Before the installation is made: a catalog without tables beside one is no new one.
        return Catalog.open(self.state / "catalog.sqlite")

    @cached_property
    def catalog_if_any(self) -> Catalog:
        """The catalog, or an empty one in memory: for verbs that promise to touch nothing."""
        return Catalog.open(self.state / "catalog.sqlite", create=False)

    @property
    def catalog_now(self) -> Catalog:
        """The catalog as far as it was opened: to write to, or only to read."""
        return self.catalog if "catalog" in self.__dict__ else self.catalog_if_any

    @cached_property
    def site_plugins(self) -> tuple[object, ...]:
        """The plugins of ``[host] plugins``."""
        return tuple(_site_plugin(name) for name in self.config.host.plugins)

    def vm(self, vm: VM) -> VMState:
        """That VM as it is now, by its UUID alone: another one's name may read like it. NotFound."""
        found = self.hypervisor.find(vm.uuid)
        if found.vm.uuid != vm.uuid:
            raise NotFound(f"there is no VM {vm.name} ({vm.uuid}) on this host; one is only called so")
        return found

    def datastore(self, name: str, *, hypervisor: bool = False) -> Datastore:
        """An open datastore by its configured name; with the hypervisor's hooks where a backup needs them.

        All its verbs are TargetUnavailable where it is not the place that the catalog knows.
        """
        same = SamePlace(self, name)
        options = self.config.datastores[self.config.datastore(name)]
        used = self.hypervisor if hypervisor else None
        store = Datastore.open(name, options, hypervisor=used, plugins=(same, *self.site_plugins))
        self._same[name] = same
        return same.opened(store)

    def any_place(self, name: str) -> Datastore:
        """The same, whatever place it is: for whoever says that it is the one that is meant."""
        options = self.config.datastores[self.config.datastore(name)]
        return Datastore.open(name, options, hypervisor=None, plugins=self.site_plugins)

    def same_place(self, name: str) -> SamePlace:
        """What looks whether the datastore `name`, as it was opened last, is the place that the catalog knows."""
        if name not in self._same:
            self.datastore(name)
        return self._same[name]

    @contextmanager
    def context(self, progress: Progress | None = None) -> Iterator[Context]:
        """A context with a private folder for a verb that is no backup; Ctrl-C and SIGTERM cancel it."""
        with folders.own(self.state) as folder:
            ctx = Context(folder, progress=progress)
            with interrupt.cancels(ctx), ctx:
                yield ctx


def _site_plugin(name: str) -> object:
    module, _, attribute = name.partition(":")
    what = f"the site plugin {name!r}"
    try:
        with loading(what, but=(ImportError, AttributeError)):
            found: object = import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{what} cannot be loaded: {error}", "It must be importable: install it, or PYTHONPATH."
        ) from error
    with loading(what):
        return found() if isinstance(found, type) else found
