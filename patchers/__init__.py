"""What a block is: block configs, their dialects, and the patcher that builds them from native classes."""
