"""Searching for tickets: rounds of training, pruning and rewinding."""

from lipfast.search.config import SearchConfig
from lipfast.search.imp import SearchResult, Status, Watch, find_tickets, search

__all__ = ["SearchConfig", "SearchResult", "Status", "Watch", "find_tickets", "search"]
