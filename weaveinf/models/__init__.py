"""Decoder-only model families: their configs, blocks and checkpoints."""
