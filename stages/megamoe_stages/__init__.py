"""The stages that ship with megamoe: one package an op."""
