"""The configuration: typed keys, composition through Hydra, what `auto` means on a device, checks of the machine."""
