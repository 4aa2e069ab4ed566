"""One file per third party, each translating its calling convention into the contract."""
