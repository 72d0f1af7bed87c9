"""Pages and who may share them: the page allocator, the radix tree over them, and the KV pool's tensors."""
