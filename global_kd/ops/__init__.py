"""One file an op: definitions in plain torch, validated at the public door, not here."""
