"""Models of a hub: names, download, cache. Imports no torch, and HTTP only where it is used."""

from __future__ import annotations

from penstock.hub.resolve import hub_model, resolve_config, resolve_model, served_name

__all__ = ["hub_model", "resolve_config", "resolve_model", "served_name"]
