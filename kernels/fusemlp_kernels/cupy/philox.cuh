// Dropout masks, computed again where they are used; philox.py defines them (Salmon et al., 2011).

struct Words {
    unsigned word[4];
};

// Philox 4x32-10 of the counter (c0, c1, c2, c3) under the key (k0, k1).
__device__ __forceinline__ Words philox(
    unsigned c0, unsigned c1, unsigned c2, unsigned c3, unsigned k0, unsigned k1) {
    for (int round = 0; round < 10; round++) {
        unsigned long long product0 = 0xD2511F53ull * c0;
        unsigned long long product1 = 0xCD9E8D57ull * c2;
        c0 = static_cast<unsigned>(product1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<unsigned>(product0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<unsigned>(product1);
        c3 = static_cast<unsigned>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Bit i: element (row, 8 * block + i) is kept. Lane 2i is the low half of word i, lane 2i + 1 the high half.
__device__ __forceinline__ unsigned kept_lanes(
    long long block, long long row, long long layer, long long batch, long long key0, long long key1,
    unsigned threshold) {
    Words words = philox(
        static_cast<unsigned>(block), static_cast<unsigned>(row), static_cast<unsigned>(layer),
        static_cast<unsigned>(batch), static_cast<unsigned>(key0), static_cast<unsigned>(key1));
    unsigned kept = 0;
    for (int i = 0; i < 4; i++) {
        if ((words.word[i] & 0xffffu) >= threshold) kept |= 1u << (2 * i);
        if (words.word[i] >> 16 >= threshold) kept |= 2u << (2 * i);
    }
    return kept;
}
