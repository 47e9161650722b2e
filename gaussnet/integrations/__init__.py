"""Other libraries, a module each: `gaussnet.integrations.diffusers` needs that extra installed."""
