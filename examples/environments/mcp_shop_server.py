"""A small server of the Model Context Protocol to try ``mcp_tools.py`` with: a shop with a cart (``pip install mcp``)."""

from __future__ import annotations

from typing import Annotated

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

PRICES = {"pen": 2, "book": 15, "lamp": 30}
server = MCPServer("shop", log_level="ERROR")
cart: list[int] = []


class Line(BaseModel):
    """A line of an order."""

    item: str
    count: int = Field(1, ge=1)


@server.tool()
def price_of(item: Annotated[str, Field(description="What is sold.")]) -> int:
    """Look up the price of an item, in euros."""
    if item not in PRICES:
        raise ToolError(f"There is no {item}, only {', '.join(PRICES)}.")
    return PRICES[item]


@server.tool()
def put(lines: list[Line]) -> str:
    """Put items into the cart."""
    cart.extend(line.count * PRICES[line.item] for line in lines)
    return f"There are {len(cart)} lines in the cart."


@server.tool()
def total() -> str:
    """What the cart costs, in euros."""
    return str(sum(cart))


if __name__ == "__main__":
    server.run("stdio")
