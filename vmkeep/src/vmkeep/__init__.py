"""Host tooling for backupcore: command line, configuration, catalog, locks."""
