"""Tickets as files: a mask, the rewound weights and what is needed to use them. See docs/ticket-format.md."""

from lipfast.tickets.ticket import Ticket

__all__ = ["Ticket"]
