"""The adversary: simulated attacks inside a defense, and real ones against its result."""
