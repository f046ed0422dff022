"""Serving: retrievers exported as programs that run without the training code."""

from jaxrec.serve.export import ExportedRetriever, ExportError, export_retriever, load_exported

__all__ = ["ExportError", "ExportedRetriever", "export_retriever", "load_exported"]
