"""Settings: how they are composed, checked and recorded."""
