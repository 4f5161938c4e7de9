"""Block-sharded loading, running, changing and saving of heterogeneous decoder models."""
