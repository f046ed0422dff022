"""Retrieval as one model: filters, indexes, retriever, publishing."""
