// A kernel at work: how values get from pixels to the lattice, through its blur, and back.
#pragma once

#include <type_traits>

#include "plan.hpp"
#include "row.hpp"

namespace terravox {

constexpr int MOST_VALUES = 256;      // a row of the widest table
constexpr size_t IN_CACHE = 1 << 17;  // values of a table that a core's cache holds beside its twin
constexpr int BLOCK = 32;             // pixels that are taken through each step together

template <class T> void fetch(const T *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

// `values` is what a pixel reads, `sums` what it adds to; a blur swaps their roles as often as it
// has steps.
struct Kernel {
    Plan plan;
    float potts = 0;              // the weight, where there is no matrix
    std::vector<float> matrix;    // T, (width, width), and empty for a Potts kernel
    std::vector<float> constant;  // c, per class but the last, and empty as well
    Large<float> values, sums;

    // Tables of that width: sums of zero, and values that are not set but for ZERO_ROW's.
    void widen(int width) {
        values.resize(plan.rows() * width);
        std::fill_n(values.data(), width, 0.0f);
        sums.assign(plan.rows() * width, 0.0f);
    }

    size_t bytes() const { return plan.bytes() + held(values) + held(sums); }
};

// Tables of rows of V values; 0 stands for `width` of them, known at run time, a multiple of STEP.
template <int V> struct Rows {
    static constexpr int STEP = V ? V : 16;  // values that are taken together
    using Part = Row<STEP>;
    int width;
    int v() const { return V ? V : width; }

    // sums -> values, all of it: what pixels added becomes what they read.
    template <class Finish> void filter(Kernel &kernel, Team &team, const Finish &finish) const {
        gather(kernel, team);
        blur(kernel, team, finish);
        spread(kernel, team);
    }

    // Adds what lies in mirrors to their vertices.
    void gather(Kernel &kernel, Team &team) const {
        const Plan &plan = kernel.plan;
        team.each(plan.parts(), [&](int64_t p) {
            float *sums = kernel.sums.data();
            for (int64_t i = plan.owner_begin[p]; i < plan.owner_begin[p + 1]; ++i) {
                const int64_t mirror = plan.by_owner[i];
                const int64_t vertex = plan.mirrored[mirror - 1 - plan.vertices];
                add(sums + vertex * v(), sums + mirror * v(), 1.0f);
            }
        });
    }

    // Sets mirrors to the values of their vertices, and the sums to zero.
    void spread(Kernel &kernel, Team &team) const {
        const Plan &plan = kernel.plan;
        team.ranges(int64_t(plan.mirrored.size()), 8192, [&](int64_t begin, int64_t end) {
            float *values = kernel.values.data();
            for (int64_t m = begin; m < end; ++m)
                std::copy_n(values + int64_t(plan.mirrored[m]) * v(), v(),
                            values + (1 + plan.vertices + m) * v());
        });
        team.ranges(int64_t(kernel.sums.size()), 1 << 16, [&](int64_t begin, int64_t end) {
            std::fill(kernel.sums.begin() + begin, kernel.sums.begin() + end, 0.0f);
        });
    }

    // Along each axis in turn; `finish(row)` for each vertex in the end.
    template <class Finish> void blur(Kernel &kernel, Team &team, const Finish &finish) const {
        const Plan &plan = kernel.plan;
        for (int j = 0; j <= plan.d; ++j) {
            const bool last = j == plan.d;
            team.ranges(plan.vertices, 8192, [&](int64_t begin, int64_t end) {
                pass(kernel, j, begin, end);
                if (!last) return;
                for (int64_t i = begin; i < end; ++i) finish(&kernel.values[(1 + i) * v()]);
            });
            if (!last) std::swap(kernel.values, kernel.sums);
        }
    }

    // What a kernel says about labels, for each row after the blur.
    template <class Use> void with_compatibility(const Kernel &kernel, const Use &use) const {
        const int n = v();
        const float gain = kernel.plan.gain();
        if (kernel.matrix.empty()) {
            const float weight = gain * kernel.potts;
            use([n, weight](float *row) {
                for (int k = 0; k < n; ++k) row[k] *= weight;
            });
            return;
        }
        use([&kernel, n, gain](float *row) {
            float mixed[MOST_VALUES] = {};
            for (int k = 0; k < n; ++k)
                for (int l = 0; l < n; ++l) mixed[k] += gain * kernel.matrix[k * n + l] * row[l];
            std::copy_n(mixed, n, row);
        });
    }

    void pass(Kernel &kernel, int axis, int64_t begin, int64_t end) const {
        constexpr int64_t AHEAD = 8;
        const int n = v();
        const int32_t *pair = &kernel.plan.neighbour[2 * axis * kernel.plan.vertices];
        const float *from = kernel.sums.data();
        float *to = kernel.values.data();
        for (int64_t i = begin; i < end; ++i) {
            if (i + AHEAD < end) {
                __builtin_prefetch(from + int64_t(pair[2 * (i + AHEAD)]) * n);
                __builtin_prefetch(from + int64_t(pair[2 * (i + AHEAD) + 1]) * n);
            }
            const float *one = from + int64_t(pair[2 * i]) * n;
            const float *two = from + int64_t(pair[2 * i + 1]) * n;
            const float *here = from + (1 + i) * n;
            float *there = to + (1 + i) * n;
            for (int k = 0; k < n; k += STEP) {
                auto beside = Part::at(one + k), sum = Part::at(here + k);
                beside.add(1.0f, Part::at(two + k));
                sum.add(0.5f, beside);
                sum.store(there + k);
            }
        }
    }

    // z = from + what the kernel says about `count` pixels from `at` on.
    void slice(const Kernel &kernel, int64_t at, int count, const float *from, float *z) const {
        at_size(kernel, [&](auto size) { slice<size>(kernel, at, count, from, z); });
    }

    // Adds q of `count` pixels from `at` on to their vertices.
    void splat(Kernel &kernel, int64_t at, int count, const float *q) const {
        at_size(kernel, [&](auto size) { splat<size>(kernel, at, count, q); });
    }

    // Fetches what slice and splat will read of `count` pixels from `soon` on, and the rows that
    // those from `next` on touch: a processor foresees neither, with arrays as many as these.
    void prefetch(const Kernel &kernel, int64_t next, int64_t soon, int count) const {
        const int size = kernel.plan.d + 1;
        fetch(&kernel.plan.row[soon * size], count * size);
        fetch(&kernel.plan.weight[soon * size], count * size);
        if (kernel.values.size() < IN_CACHE) return;
        const int32_t *row = &kernel.plan.row[next * size];
        for (int i = 0; i < count * size; ++i) {
            fetch(kernel.values.data() + int64_t(row[i]) * v(), v());
            fetch(kernel.sums.data() + int64_t(row[i]) * v(), v());
        }
    }

    void add(float *to, const float *from, float share) const {
        for (int k = 0; k < v(); k += STEP) {
            auto sum = Part::at(to + k);
            sum.add(share, Part::at(from + k));
            sum.store(to + k);
        }
    }

private:
    template <int SIZE>
    void slice(const Kernel &kernel, int64_t at, int count, const float *from, float *z) const {
        const int n = v(), size = SIZE ? SIZE : kernel.plan.d + 1;
        const int32_t *row = &kernel.plan.row[at * size];
        const float *weight = &kernel.plan.weight[at * size];
        const float *values = kernel.values.data();
        for (int i = 0; i < count; ++i, row += size, weight += size)
            for (int k = 0; k < n; k += STEP) {
                auto sum = Part::at(from + i * n + k);
#pragma GCC unroll 8
                for (int r = 0; r < size; ++r)
                    sum.add(weight[r], Part::at(values + int64_t(row[r]) * n + k));
                sum.store(z + i * n + k);
            }
    }

    template <int SIZE> void splat(Kernel &kernel, int64_t at, int count, const float *q) const {
        const int n = v(), size = SIZE ? SIZE : kernel.plan.d + 1;
        const int32_t *row = &kernel.plan.row[at * size];
        const float *weight = &kernel.plan.weight[at * size];
        float *sums = kernel.sums.data();
        for (int i = 0; i < count; ++i, row += size, weight += size)
            for (int k = 0; k < n; k += STEP) {
                const auto mine = Part::at(q + i * n + k);
#pragma GCC unroll 8
                for (int r = 0; r < size; ++r) {
                    float *to = sums + int64_t(row[r]) * n + k;
                    auto sum = Part::at(to);
                    sum.add(weight[r], mine);
                    sum.store(to);
                }
            }
    }

    // Calls use(integral_constant) with the vertices a pixel has, or 0 where that is seldom.
    template <class Use> static void at_size(const Kernel &kernel, const Use &use) {
        switch (kernel.plan.d + 1) {
            case 3: return use(std::integral_constant<int, 3>());
            case 4: return use(std::integral_constant<int, 4>());
            case 5: return use(std::integral_constant<int, 5>());
            case 6: return use(std::integral_constant<int, 6>());
            default: return use(std::integral_constant<int, 0>());
        }
    }
};

inline void splat_ones(Kernel &kernel, Team &team) {
    std::vector<float> ones(BLOCK, 1.0f);
    team.ranges(kernel.plan.pixels, PART, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += BLOCK)
            Rows<1>{1}.splat(kernel, at, int(std::min<int64_t>(BLOCK, end - at)), ones.data());
    });
}

inline std::vector<float> slice_ones(const Kernel &kernel, Team &team) {
    std::vector<float> result(kernel.plan.pixels, 0.0f);
    team.ranges(kernel.plan.pixels, PART, [&](int64_t begin, int64_t end) {
        Rows<1>{1}.slice(kernel, begin, int(end - begin), &result[begin], &result[begin]);
    });
    return result;
}

// A kernel's filter of 1 with its current weights, per pixel.
inline std::vector<float> filter_ones(Kernel &kernel, Team &team) {
    const float gain = kernel.plan.gain();
    kernel.widen(1);
    splat_ones(kernel, team);
    Rows<1>{1}.filter(kernel, team, [gain](float *row) { *row *= gain; });
    return slice_ones(kernel, team);
}

// Folds the symmetric normalisation into the weights. ones: the filter of 1, per pixel.
inline void normalise(Kernel &kernel, const std::vector<float> &ones, Team &team) {
    const int size = kernel.plan.d + 1;
    team.ranges(kernel.plan.pixels, PART, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
            const float norm = 1.0f / std::sqrt(ones[at] + 1e-20f);
            for (int r = 0; r < size; ++r) kernel.plan.weight[at * size + r] *= norm;
        }
    });
}

}  // namespace terravox
