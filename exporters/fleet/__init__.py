"""A gateway for many devices: it adds what they have learned and writes one bundle for all of them."""
