// Mean field of a fully connected CRF (Kraehenbuehl and Koltun, 2011) over planned kernels.
//
// Everything is relative to the last class: of K classes, V = K - 1 differences r_k = q_k - q_K are
// filtered, and q = softmax(z, 0). A kernel G with the Potts weight w adds w G r_k to z_k, so classes
// that are alike stay so to the bit. With a penalty matrix mu, a(k, l) = mu(k, l) - mu(K, l) and A_k
// = sum over l of a(k, l), it adds sum over l of T(k, l) G r_l, with T = A_k / K - a(k, l), and c_k =
// -A_k / K times G 1, its mass. Since G is linear, T is applied to the lattice's rows.
#pragma once

#include <cstring>

#include "plan.hpp"

namespace terravox {

constexpr int MOST_VALUES = 256;  // a row of the widest table
constexpr int AHEAD = 4;   // pixels whose rows are fetched before their turn
constexpr size_t IN_CACHE = 1 << 17;  // values of a table that a core's cache holds beside its twin
constexpr int BLOCK = 32;   // pixels whose softmax is taken together

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

template <int STEP> struct ChunkOf {
    typedef float type __attribute__((vector_size(STEP * sizeof(float)), aligned(sizeof(float))));
};
template <> struct ChunkOf<1> {
    using type = float;
};

// Whole rows at a time. GCC's vector types say that lanes are apart, which it cannot see of pointers.
template <int V> struct Lanes {
    static constexpr int STEP = V % 8 == 0 && V ? 8 : V % 4 == 0 && V ? 4 : 1;
    using Chunk = typename ChunkOf<STEP>::type;

    template <class Each> static void each(int n, const Each &each) {
        if constexpr (V == 0)
            for (int k = 0; k < n; ++k) each(k);
        else
#pragma GCC unroll 8
            for (int k = 0; k < V; k += STEP) each(k);
    }

    static Chunk load(const float *from) { return *reinterpret_cast<const Chunk *>(from); }
    static void store(float *to, Chunk chunk) { *reinterpret_cast<Chunk *>(to) = chunk; }
};

// A kernel at work. `values` is what a pixel reads, `sums` what it adds to; a blur swaps their roles
// as often as it has steps. V values a row; 0 stands for `width` of them, known at run time.
struct Kernel {
    Plan plan;
    float potts = 0;             // the weight, where there is no matrix
    std::vector<float> matrix;    // T, (width, width), and empty for a Potts kernel
    std::vector<float> constant;  // c, per class but the last, and empty as well
    Large<float> values, sums;

    void widen(int width) {
        values.assign(plan.rows() * width, 0.0f);
        sums.assign(plan.rows() * width, 0.0f);
    }
};

template <int V> struct Rows {
    using L = Lanes<V>;
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
            L::each(n, [&](int k) {
                L::store(there + k, L::load(here + k) + 0.5f * (L::load(one + k) + L::load(two + k)));
            });
        }
    }

    // Adds what the kernel says about pixel `at` to z.
    void slice(const Kernel &kernel, int64_t at, float *z) const {
        const int n = v(), size = kernel.plan.d + 1;
        const int32_t *row = &kernel.plan.row[at * size];
        const float *weight = &kernel.plan.weight[at * size];
        const float *values = kernel.values.data();
        if constexpr (V == 0) {
            for (int r = 0; r < size; ++r) add(z, values + int64_t(row[r]) * n, weight[r]);
        } else {
            typename L::Chunk sum[V / L::STEP];  // in registers: z in memory would be a chain of stores
            L::each(n, [&](int k) { sum[k / L::STEP] = L::load(z + k); });
            for (int r = 0; r < size; ++r) {
                const float *from = values + int64_t(row[r]) * n;
                L::each(n, [&](int k) { sum[k / L::STEP] += weight[r] * L::load(from + k); });
            }
            L::each(n, [&](int k) { L::store(z + k, sum[k / L::STEP]); });
        }
    }

    void splat(Kernel &kernel, int64_t at, const float *q) const {
        const int n = v(), size = kernel.plan.d + 1;
        const int32_t *row = &kernel.plan.row[at * size];
        const float *weight = &kernel.plan.weight[at * size];
        float *sums = kernel.sums.data();
        for (int r = 0; r < size; ++r) add(sums + int64_t(row[r]) * n, q, weight[r]);
    }

    // What slice and splat will touch of pixel `at`.
    void prefetch(const Kernel &kernel, int64_t at) const {
        const int n = v(), size = kernel.plan.d + 1;
        if (kernel.values.size() < IN_CACHE) return;
        const int32_t *row = &kernel.plan.row[at * size];
        for (int r = 0; r < size; ++r) {
            __builtin_prefetch(kernel.values.data() + int64_t(row[r]) * n);
            __builtin_prefetch(kernel.sums.data() + int64_t(row[r]) * n, 1);
        }
    }

    void add(float *to, const float *from, float share) const {
        L::each(v(), [&](int k) { L::store(to + k, L::load(to + k) + share * L::load(from + k)); });
    }
};

inline void splat_ones(Kernel &kernel, Team &team) {
    const float one = 1.0f;
    team.ranges(kernel.plan.pixels, PART, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) Rows<1>{1}.splat(kernel, at, &one);
    });
}

inline std::vector<float> slice_ones(const Kernel &kernel, Team &team) {
    std::vector<float> result(kernel.plan.pixels, 0.0f);
    team.ranges(kernel.plan.pixels, PART, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) Rows<1>{1}.slice(kernel, at, &result[at]);
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

template <int V> class MeanField {
public:
    // energy: (classes, pixels); width: classes - 1, rounded up with values that are never read.
    MeanField(const float *energy, int classes, int width, std::vector<Kernel> &kernels, Team &team)
        : rows_{width}, classes_(classes), pixels_(kernels[0].plan.pixels), kernels_(kernels),
          team_(team), base_(pixels_ * width, -1e30f) {
        const int last = classes - 1;
        team_.ranges(pixels_, PART, [&](int64_t begin, int64_t end) {
            for (int k = 0; k < last; ++k)
                for (int64_t at = begin; at < end; ++at)
                    base_[at * rows_.v() + k] = energy[last * pixels_ + at] - energy[k * pixels_ + at];
        });
    }

    // masses: of each kernel, the filter of 1 per pixel; empty for a Potts kernel.
    void run(int iterations, const std::vector<std::vector<float>> &masses, float *prob) {
        for (auto &kernel : kernels_) kernel.widen(rows_.v());
        for (int i = 0; i < iterations; ++i) {
            update(i > 0, nullptr);  // the first softmax is of the unary energies alone
            for (size_t m = 0; m < masses.size() && i == 0; ++m)
                add_constant(masses[m], kernels_[m].constant);
            for (auto &kernel : kernels_)
                rows_.with_compatibility(
                    kernel, [&](auto finish) { rows_.filter(kernel, team_, finish); });
        }
        update(true, prob);
    }

    // constant: per class, what a pixel's kernel mass adds to z beside T.
    void add_constant(const std::vector<float> &mass, const std::vector<float> &constant) {
        if (constant.empty()) return;
        team_.ranges(pixels_, PART, [&](int64_t begin, int64_t end) {
            for (int64_t at = begin; at < end; ++at)
                for (int k = 0; k < classes_ - 1; ++k)
                    base_[at * rows_.v() + k] += mass[at] * constant[k];
        });
    }

    // One softmax of what the kernels say, if `sliced`: splatted, or written to `prob`.
    void update(bool sliced, float *prob) {
        const int n = rows_.v();
        team_.ranges(pixels_, PART, [&](int64_t begin, int64_t end) {
            std::vector<float> z(BLOCK * n);
            float last[BLOCK];
            for (int64_t at = begin; at < end; at += BLOCK) {
                const int count = int(std::min<int64_t>(BLOCK, end - at));
                std::copy_n(&base_[at * n], count * n, z.data());
                if (sliced)
                    for (int i = 0; i < count; ++i)
                        for (const auto &kernel : kernels_) {
                            if (at + i + AHEAD < end) rows_.prefetch(kernel, at + i + AHEAD);
                            rows_.slice(kernel, at + i, &z[i * n]);
                        }
                softmax(z.data(), last, count);
                if (prob)
                    write(z.data(), last, count, prob + at);
                else
                    for (int i = 0; i < count; ++i) {
                        for (int k = 0; k < n; ++k) z[i * n + k] -= last[i];
                        for (auto &kernel : kernels_) rows_.splat(kernel, at + i, &z[i * n]);
                    }
            }
        });
    }

private:
    void softmax(float *z, float *last, int count) const {
        const int n = rows_.v();
        for (int i = 0; i < count; ++i) {
            float top = 0.0f;
            for (int k = 0; k < n; ++k) top = std::max(top, z[i * n + k]);
            for (int k = 0; k < n; ++k) z[i * n + k] -= top;
            last[i] = -top;
        }
        for (int i = 0; i < count * n; ++i) z[i] = exp_negative(z[i]);
        for (int i = 0; i < count; ++i) last[i] = exp_negative(last[i]);
        for (int i = 0; i < count; ++i) {
            float sum = last[i];
            for (int k = 0; k < n; ++k) sum += z[i * n + k];
            const float share = 1.0f / sum;
            for (int k = 0; k < n; ++k) z[i * n + k] *= share;
            last[i] *= share;
        }
    }

    void write(const float *q, const float *last, int count, float *prob) const {
        for (int k = 0; k < classes_ - 1; ++k)
            for (int i = 0; i < count; ++i) prob[k * pixels_ + i] = q[i * rows_.v() + k];
        std::copy_n(last, count, prob + int64_t(classes_ - 1) * pixels_);
    }

    Rows<V> rows_;
    int classes_;
    int64_t pixels_;
    std::vector<Kernel> &kernels_;
    Team &team_;
    std::vector<float> base_;
};

}  // namespace terravox
