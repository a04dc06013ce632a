"""How AMP lives inside timm and transformers."""
