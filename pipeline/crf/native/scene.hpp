// One lattice under all tiles of a scene, of which each tile knows its own surroundings.
//
// A tile sums up what its pixels add to the vertices that they touch. Those sums are what tiles tell
// one another: a tile adds up its own and its neighbours', blurs the result, and reads its pixels'
// values from it. It needs all vertices that a blur can carry to the ones that it touches, and no
// more; the rim of them comes out wrong, and nobody reads it.
//
// Sums are whole numbers of 2^-32, so no order of pixels, tiles or processes shows in them: a pixel
// gets the same bits whichever tile it lies in.
#pragma once

#include <optional>

#include "mean_field.hpp"

namespace terravox {

constexpr double UNITS = 4294967296.0;  // of a sum, in 1

using Sums = std::vector<int64_t>;  // (vertices, columns)

// How far a blur carries along feature k, in its deviations. A simplex reaches half as far.
inline double reach_of(int k) { return 2 * std::sqrt(1.5 * (k + 1) / (k + 2)); }

// One kernel's lattice, as far as a tile needs it.
struct Surroundings {
    Packing packing;
    Numbering<Wide> numbering;  // the tile's own vertices, then its neighbours'
    std::vector<Wide> own;      // keys of the tile's
    std::vector<int32_t> rows;  // of each row of sums that comes in
    Kernel kernel;              // over all vertices; no pixels

    Surroundings(std::vector<float> low, std::vector<float> high) {
        const auto scale = scales(int(low.size()));
        for (size_t k = 0; k < low.size(); ++k) low[k] *= scale[k], high[k] *= scale[k];
        packing = Packing::of(low, high);
        kernel.plan.d = packing.d;
    }

    void meet(const uint64_t *keys, int64_t count, Team &team) {
        rows.reserve(own.size() + count);
        for (size_t i = 0; i < own.size(); ++i) rows.push_back(int32_t(1 + i));
        for (int64_t i = 0; i < count; ++i) {
            const Wide key = Wide(keys[2 * i + 1]) << 64 | keys[2 * i];
            rows.push_back(1 + numbering.number(key));
        }
        kernel.plan.link(numbering, packing, team);
        numbering = Numbering<Wide>();  // the largest part, and of no use any more
        std::vector<Wide>().swap(own);
    }

    size_t bytes() const {
        return numbering.bytes() + held(own) + held(rows) + kernel.bytes();
    }

    // Columns [first, first + count) of what came in, added up; the rows of `values` are `width` wide.
    void total(const int64_t *sums, int columns, int first, int count, int width) {
        kernel.widen(width);
        Sums added((1 + kernel.plan.vertices) * count);
        for (size_t i = 0; i < rows.size(); ++i)
            for (int k = 0; k < count; ++k)
                added[int64_t(rows[i]) * count + k] += sums[int64_t(i) * columns + first + k];
        for (int64_t row = 0; row <= kernel.plan.vertices; ++row)
            for (int k = 0; k < count; ++k)
                kernel.sums[row * width + k] = float(double(added[row * count + k]) / UNITS);
    }

    // What the vertices hold after the blur, to those that the tile's pixels read.
    template <int V> void lend(Kernel &pixels, int width, Team &team) const {
        pixels.widen(width);
        std::copy_n(&kernel.values[width], pixels.plan.vertices * width, &pixels.values[width]);
        Rows<V>{width}.spread(pixels, team);
    }

    // The blurred first column of `sums`, per pixel.
    std::vector<float> slice(Kernel &pixels, const int64_t *sums, int columns, int column,
                             Team &team) {
        const float gain = kernel.plan.gain();
        total(sums, columns, column, 1, 1);
        Rows<1>{1}.blur(kernel, team, [gain](float *row) { *row *= gain; });
        lend<1>(pixels, 1, team);
        return slice_ones(pixels, team);
    }
};

// `fill(at, q)` says what pixel `at` adds; the sums of the vertices that the pixels touch.
template <class Fill> Sums splat(const Plan &plan, int columns, Team &team, const Fill &fill) {
    Sums sums(plan.rows() * columns);
    const int size = plan.d + 1;
    team.ranges(plan.pixels, PART, [&](int64_t begin, int64_t end) {
        std::vector<float> q(columns);
        for (int64_t at = begin; at < end; ++at) {
            fill(at, q.data());
            for (int r = 0; r < size; ++r) {
                int64_t *to = &sums[int64_t(plan.row[at * size + r]) * columns];
                const float weight = plan.weight[at * size + r];
                for (int k = 0; k < columns; ++k) to[k] += int64_t(double(weight * q[k]) * UNITS);
            }
        }
    });
    for (size_t m = 0; m < plan.mirrored.size(); ++m)
        for (int k = 0; k < columns; ++k)
            sums[int64_t(plan.mirrored[m]) * columns + k] +=
                sums[(1 + plan.vertices + int64_t(m)) * columns + k];
    sums.resize((1 + plan.vertices) * columns);
    sums.erase(sums.begin(), sums.begin() + columns);
    return sums;
}

// The pixels of one tile. Rows of keys and sums that come in are the tile's own, then its
// neighbours' in one order throughout. They are met once, then read in each round. One team works
// on many tiles in turn, so that a tile that is kept holds no threads.
class SceneTile {
public:
    SceneTile(int classes, int width, Team &team) : team(team), classes(classes), width(width) {}
    virtual ~SceneTile() = default;

    Team &team;
    int classes, width;
    std::vector<Surroundings> around;  // of each kernel
    std::vector<Kernel> pixels;        // theirs over the tile's pixels

    virtual void place(const float *energy, int64_t count,
                       const std::vector<const float *> &features) = 0;

    // Differences to the last class, and the mass where a matrix wants it.
    int columns(size_t m) const { return classes - 1 + !pixels[m].constant.empty(); }

    // Of memory, all in all.
    virtual size_t bytes() const {
        size_t sum = 0;
        for (size_t m = 0; m < pixels.size(); ++m) sum += around[m].bytes() + pixels[m].bytes();
        return sum;
    }

    // (own vertices, 2): low and high words of their keys. Before they are met, as their positions.
    std::vector<uint64_t> keys(size_t m) const {
        std::vector<uint64_t> words;
        for (const Wide key : around[m].own) {
            words.push_back(uint64_t(key));
            words.push_back(uint64_t(key >> 64));
        }
        return words;
    }

    // (own vertices, axes): where they lie by the first features, in deviations.
    std::vector<float> positions(size_t m, int axes) const {
        const Packing &packing = around[m].packing;
        const auto scale = scales(packing.d);
        std::vector<float> found;
        for (const Wide key : around[m].own) {
            const auto at = packing.coordinates(key);
            double sum = 0;
            for (int k = 0; k < axes; ++k) {
                sum += double(at[k]);
                found.push_back(float((sum - (k + 1) * double(at[k + 1])) / (k + 1) / (k + 2) / scale[k]));
            }
        }
        return found;
    }

    Sums ones(size_t m) {
        return splat(pixels[m].plan, 1, team, [](int64_t, float *q) { *q = 1; });
    }

    // keys: (others, 2); ones: (own and others, 1). Weights are normalised by them.
    void meet(size_t m, const uint64_t *keys, int64_t count, const int64_t *ones) {
        around[m].meet(keys, count, team);
        normalise(pixels[m], around[m].slice(pixels[m], ones, 1, 0, team), team);
    }

    // sums: (own and others, columns) of each kernel, that the pixels are to read.
    virtual void read(const std::vector<const int64_t *> &sums) = 0;

    // The softmax of energies and of what was read, if anything; prob: (classes, pixels).
    virtual void update(float *prob) = 0;

    // What these probabilities add to the tile's own vertices.
    Sums sums(size_t m, const float *prob) {
        const Plan &plan = pixels[m].plan;
        const int64_t count = plan.pixels;
        const int last = classes - 1;
        const bool massive = columns(m) > last;
        return splat(plan, columns(m), team, [&](int64_t at, float *q) {
            for (int k = 0; k < last; ++k) q[k] = prob[k * count + at] - prob[last * count + at];
            if (massive) q[last] = 1;
        });
    }
};

template <int V> class SceneTileOf : public SceneTile {
public:
    using SceneTile::SceneTile;

    void place(const float *energy, int64_t count,
               const std::vector<const float *> &features) override {
        for (size_t m = 0; m < features.size(); ++m) {
            Plan &plan = pixels[m].plan;
            plan.d = around[m].packing.d;
            plan.pixels = count;
            around[m].numbering = plan.place<Wide>(features[m], around[m].packing, team);
            around[m].own = around[m].numbering.keys();
        }
        field_.emplace(energy, classes, width, pixels, team);
    }

    void read(const std::vector<const int64_t *> &sums) override {
        const Rows<V> rows{width};
        for (size_t m = 0; m < sums.size(); ++m) {
            Surroundings &here = around[m];
            const int all = columns(m), last = classes - 1;
            if (all > last && !read_)
                field_->add_constant(here.slice(pixels[m], sums[m], all, last, team),
                                     pixels[m].constant);
            here.total(sums[m], all, 0, last, width);
            rows.with_compatibility(here.kernel,
                                    [&](auto finish) { rows.blur(here.kernel, team, finish); });
            here.template lend<V>(pixels[m], width, team);
        }
        read_ = true;
    }

    void update(float *prob) override { field_->update(read_, prob); }

    size_t bytes() const override { return SceneTile::bytes() + field_->bytes(); }

private:
    std::optional<MeanField<V>> field_;
    bool read_ = false;
};

}  // namespace terravox
