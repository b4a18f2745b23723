"""Ranks: joining, collectives that name a lost peer, stop signals, heartbeats."""
