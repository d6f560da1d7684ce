// Rows of V float32 values in registers, and what is done to their lanes.
//
// Vector types say that lanes are apart, which a compiler cannot see of pointers, and they fix the
// order of sums for any processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace terravox {

template <int N> struct LanesOf {
    typedef float type __attribute__((vector_size(N * sizeof(float)), aligned(sizeof(float))));
};
template <> struct LanesOf<1> {
    using type = float;
};

// The first 8 values, or as many of 4, 2 and 1 as there are, and a row of the others.
template <int V> struct Row {
    static constexpr int HEAD = V >= 8 ? 8 : V >= 4 ? 4 : V >= 2 ? 2 : 1;
    using Lanes = typename LanesOf<HEAD>::type;
    Lanes head;
    Row<V - HEAD> tail;

    static Row at(const float *from) {
        return {*reinterpret_cast<const Lanes *>(from), Row<V - HEAD>::at(from + HEAD)};
    }

    void store(float *to) const {
        *reinterpret_cast<Lanes *>(to) = head;
        tail.store(to + HEAD);
    }

    void add(float share, const Row &other) {
        head += share * other.head;
        tail.add(share, other.tail);
    }

    void subtract(float value) {
        head -= value;
        tail.subtract(value);
    }

    void scale(float factor) {
        head *= factor;
        tail.scale(factor);
    }

    float sum() const { return fold([](auto a, auto b) { return a + b; }); }
    float greatest() const { return fold([](auto a, auto b) { return a > b ? a : b; }); }

private:
    template <int> friend struct Row;

    // All values joined, halves with halves.
    template <class Join> float fold(const Join &join) const {
        if constexpr (V == 1) {
            return head;
        } else if constexpr (V >= 2 * HEAD) {
            auto rest = tail;
            rest.head = join(head, rest.head);
            return rest.fold(join);
        } else {
            auto half = halves(join);
            if constexpr (V > HEAD) half.head = join(half.head, tail.head);
            return half.fold(join);
        }
    }

    template <class Join> Row<HEAD / 2> halves(const Join &join) const {
        if constexpr (HEAD == 8)
            return {join(__builtin_shufflevector(head, head, 0, 1, 2, 3),
                         __builtin_shufflevector(head, head, 4, 5, 6, 7)), {}};
        else if constexpr (HEAD == 4)
            return {join(__builtin_shufflevector(head, head, 0, 1),
                         __builtin_shufflevector(head, head, 2, 3)), {}};
        else
            return {join(head[0], head[1]), {}};
    }
};

template <> struct Row<0> {
    static Row at(const float *) { return {}; }
    void store(float *) const {}
    void add(float, const Row &) {}
    void subtract(float) {}
    void scale(float) {}
};

// exp(x) for x <= 0, and 0 below -64: less would only make denormal numbers. Relative error 2e-7.
inline float exp_negative(float x) {
    const float clipped = x < -64.0f ? -64.0f : x;
    constexpr float ROUND = 12582912.0f;
    const float whole = (clipped * 1.44269504f + ROUND) - ROUND;
    const float rest = (clipped - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float poly = 1.9875691500e-4f;
    poly = poly * rest + 1.3981999507e-3f;
    poly = poly * rest + 8.3334519073e-3f;
    poly = poly * rest + 4.1665795894e-2f;
    poly = poly * rest + 1.6666665459e-1f;
    poly = poly * rest + 5.0000001201e-1f;
    const float value = poly * rest * rest + rest + 1.0f;
    const int32_t bits = (int32_t(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -64.0f ? 0.0f : value * power;
}

}  // namespace terravox
