"""What `echorl plan` says: memory and least times of a config on chips that need not be there."""
