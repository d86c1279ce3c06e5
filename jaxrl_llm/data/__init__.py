"""Text that experiments read: public packages fetched by name, and the readers of their formats."""
