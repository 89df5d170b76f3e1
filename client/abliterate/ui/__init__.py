"""The read-only page: one file, served on a loopback port to whoever holds the link, fed from the control socket."""
