"""Result rows as tables and sentences."""
