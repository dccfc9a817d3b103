"""Pictures on the disk: the one way pixels are read, what is known of each file, the caches, look-alikes, the cut.

No model and no torch: what a network makes of a picture lives in scoring/ and training/.
"""
