"""Databases: SQLite in a file by default, PostgreSQL when asked. SQLAlchemy Core, never its ORM."""
