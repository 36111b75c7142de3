"""``echorl plan``: memory and least times of a config on chips that this machine need not have."""
