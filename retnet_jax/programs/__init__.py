"""The programs: flags, help, and messages a person can act on."""
