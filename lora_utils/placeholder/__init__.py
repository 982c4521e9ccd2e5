"""The zero-prior placeholder token: its name, its id, its embedding, and what is reported of it."""
