"""The engine level: whole models through scheduler, cache and runner on a device, against themselves and the op bodies."""
