"""Networks, proxies and peers that programs under test meet."""
