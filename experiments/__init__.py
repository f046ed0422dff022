"""One file, one experiment; `record` writes what was measured, `report` shows it."""
