"""The subcommands of `sharded-ckpt`, one module each. See `sharded_ckpt.cli`."""
