"""What people look at: checkpoints at a glance, as text, as JSON, in notebooks. No torch here."""
