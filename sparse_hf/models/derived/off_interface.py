"""Families whose attention no pattern can reach, and what they do instead; of others it is said that they are off the interface."""

# dense model type -> what it does, behind "it computes attention by itself, and"
OFF_THE_INTERFACE = {
    "convbert": "mixes it with convolutions whose kernels depend on content",
    "cpmant": "adds a bias of segments to each pair of tokens",
    "fnet": "mixes tokens by a Fourier transform, which has no pairs",
    "fsmt": "keeps keys in an order of its own",
    "funnel": "pools the text between its layers",
    "luke": "scores words and entities by projections of their own",
    "mra": "approximates it by blocks of several sizes",
    "nystromformer": "approximates it by landmarks",
    "squeezebert": "computes it by convolutions over channels",
    "swinv2": "computes it within windows of an image that it cuts out itself",
    "xlnet": "adds scores of positions that depend on content",
    "yoso": "estimates it by hashes",
}
