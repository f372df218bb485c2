"""What a stress test found, for people: a page that opens from disk, and a section for a model card.

The figures are the certificate's; nothing is measured here.
"""
