"""crcli: freeze a running process tree, ship it to a store, bring it back."""

__version__ = "0.1.0"
