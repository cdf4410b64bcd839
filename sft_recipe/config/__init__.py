"""The configuration is defined, composed through Hydra, validated and checked against the machine here."""
