// Mean field of a fully connected CRF (Kraehenbuehl and Koltun, 2011) over planned kernels.
//
// Everything is relative to the last class: of K classes, V = K - 1 differences r_k = q_k - q_K are
// filtered, and q = softmax(z, 0). A kernel G with the Potts weight w adds w G r_k to z_k, so classes
// that are alike stay so to the bit. With a penalty matrix mu, a(k, l) = mu(k, l) - mu(K, l) and A_k
// = sum over l of a(k, l), it adds sum over l of T(k, l) G r_l, with T = A_k / K - a(k, l), and c_k =
// -A_k / K times G 1, its mass. Since G is linear, T is applied to the lattice's rows.
#pragma once

#include "kernel.hpp"

namespace terravox {

template <int V> class MeanField {
public:
    // energy: (classes, pixels); width: classes - 1, rounded up with values that are never read.
    MeanField(const float *energy, int classes, int width, std::vector<Kernel> &kernels, Team &team)
        : rows_{width}, classes_(classes), pixels_(kernels[0].plan.pixels), kernels_(kernels),
          team_(team), base_(pixels_ * width) {
        const int last = classes - 1;
        team_.ranges(pixels_, 512, [&](int64_t begin, int64_t end) {  // a cache holds their rows
            std::fill(&base_[begin * width], &base_[end * width - 1] + 1, -1e30f);
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
        team_.ranges(pixels_, PART, [&](int64_t begin, int64_t end) {
            std::vector<float> z(BLOCK * rows_.v());
            float last[BLOCK], share[BLOCK];
            for (int64_t at = begin; at < end; at += BLOCK) {
                const int count = int(std::min<int64_t>(BLOCK, end - at));
                const int64_t stop = end - count;
                prefetch(std::min(at + BLOCK, stop), std::min(at + 2 * BLOCK, stop), count);
                const float *from = &base_[at * rows_.v()];
                for (size_t m = 0; sliced && m < kernels_.size(); ++m, from = z.data())
                    rows_.slice(kernels_[m], at, count, from, z.data());
                softmax(from, z.data(), last, share, count);
                if (prob) {
                    write(z.data(), last, share, count, prob + at);
                    continue;
                }
                relative(z.data(), last, share, count);
                for (auto &kernel : kernels_) rows_.splat(kernel, at, count, z.data());
            }
        });
    }

    size_t bytes() const { return held(base_); }

private:
    using Part = typename Rows<V>::Part;
    static constexpr int STEP = Rows<V>::STEP;

    void prefetch(int64_t next, int64_t soon, int count) const {
        fetch(&base_[soon * rows_.v()], count * rows_.v());
        for (const auto &kernel : kernels_) rows_.prefetch(kernel, next, soon, count);
    }

    // From logits to odds, and the share of the whole that an odd of 1 is.
    void softmax(const float *from, float *z, float *last, float *share, int count) const {
        const int n = rows_.v();
        for (int i = 0; i < count; ++i) {
            float top = 0.0f;
            for (int k = 0; k < n; k += STEP) {
                const float here = Part::at(from + i * n + k).greatest();
                top = here > top ? here : top;  // not std::max, which became a branch
            }
            for (int k = 0; k < n; k += STEP) {
                auto part = Part::at(from + i * n + k);
                part.subtract(top);
                part.store(z + i * n + k);
            }
            last[i] = -top;
        }
        for (int i = 0; i < count * n; ++i) z[i] = exp_negative(z[i]);
        for (int i = 0; i < count; ++i) last[i] = exp_negative(last[i]);
        for (int i = 0; i < count; ++i) {
            share[i] = last[i];
            for (int k = 0; k < n; k += STEP) share[i] += Part::at(z + i * n + k).sum();
        }
        for (int i = 0; i < count; ++i) share[i] = 1.0f / share[i];
    }

    // From odds to probabilities less that of the last class.
    void relative(float *z, const float *last, const float *share, int count) const {
        const int n = rows_.v();
        for (int i = 0; i < count; ++i)
            for (int k = 0; k < n; k += STEP) {
                auto part = Part::at(z + i * n + k);
                part.subtract(last[i]);
                part.scale(share[i]);
                part.store(z + i * n + k);
            }
    }

    void write(const float *odds, const float *last, const float *share, int count,
               float *prob) const {
        for (int k = 0; k < classes_ - 1; ++k)
            for (int i = 0; i < count; ++i)
                prob[k * pixels_ + i] = odds[i * rows_.v() + k] * share[i];
        for (int i = 0; i < count; ++i) prob[(classes_ - 1) * pixels_ + i] = last[i] * share[i];
    }

    Rows<V> rows_;
    int classes_;
    int64_t pixels_;
    std::vector<Kernel> &kernels_;
    Team &team_;
    Large<float> base_;
};

}  // namespace terravox
