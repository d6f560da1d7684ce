// One lattice under all tiles of a scene, so that a tiling does not change the result.
//
// A tile keeps a table of its own for the vertices that its pixels touch. What it adds is merged by
// key into the scene's, in the order of the tiles; the scene's is blurred once, and tiles read from
// it. All tiles are visited once for each pass, and nothing of a tile is kept between two: memory is
// the lattice and one tile, whatever the scene. A tile in the middle of a pass must come as before.
#pragma once

#include "mean_field.hpp"

namespace terravox {

// A kernel over the whole scene. Its packing must hold for every tile, so it comes from bounds.
struct Shared {
    Packing packing;
    Numbering<Wide> numbering;
    Kernel kernel;
    Large<float> ones, mass;      // blurred 1: with plain weights, and with normalised ones

    Shared(std::vector<float> low, std::vector<float> high) {
        const auto scale = scales(int(low.size()));
        for (size_t k = 0; k < low.size(); ++k) low[k] *= scale[k], high[k] *= scale[k];
        packing = Packing::of(low, high);
        kernel.plan.d = packing.d;
    }
};

// A visited tile's share of one kernel.
struct Share {
    Kernel kernel;
    std::vector<int32_t> rows;  // in the scene's table, of each of the tile's vertices

    // The tile's sums are added to the scene's.
    template <int V> void push(Shared &shared, int width, Team &team) {
        const Rows<V> table{width};
        table.gather(kernel, team);
        float *sums = shared.kernel.sums.data();
        for (size_t i = 0; i < rows.size(); ++i)
            table.add(sums + int64_t(rows[i]) * width, &kernel.sums[(1 + i) * width], 1.0f);
    }

    template <int V> void pull(const Large<float> &values, int width, Team &team) {
        kernel.widen(width);
        for (size_t i = 0; i < rows.size(); ++i)
            std::copy_n(&values[int64_t(rows[i]) * width], width, &kernel.values[(1 + i) * width]);
        Rows<V>{width}.spread(kernel, team);
    }

    std::vector<float> slice(const Large<float> &values, Team &team) {
        pull<1>(values, 1, team);
        return slice_ones(kernel, team);
    }
};

class Scene {
public:
    enum class Pass { touch, ones, mass, first, step };

    Scene(int classes, int width, int threads) : team(threads), classes(classes), width(width) {}
    virtual ~Scene() = default;

    Team team;
    int classes, width;
    std::vector<std::unique_ptr<Shared>> shared;

    // What this pass does with a tile. In a step, `prob` (classes, pixels) is what is wanted instead
    // of another iteration, where it is given.
    virtual void visit(const float *energy, int64_t pixels,
                       const std::vector<const float *> &features, float *prob) = 0;

    // After all tiles: on to the next pass. Every step but the first follows another.
    void advance() {
        for (auto &one : shared) {
            Kernel &kernel = one->kernel;
            const float gain = kernel.plan.gain();
            const auto louder = [gain](float *row) { *row *= gain; };
            if (pass == Pass::touch) {
                kernel.plan.link(one->numbering, one->packing, team);
                kernel.widen(1);
            } else if (pass == Pass::ones) {
                Rows<1>{1}.filter(kernel, team, louder);
                one->ones = kernel.values;
            } else if (pass == Pass::mass) {
                Rows<1>{1}.filter(kernel, team, louder);
                one->mass = kernel.values;
                kernel.widen(width);
            } else {
                blur(kernel);
            }
        }
        if (pass != Pass::step) pass = Pass(int(pass) + 1);
    }

protected:
    virtual void blur(Kernel &kernel) = 0;
    Pass pass = Pass::touch;
};

template <int V> class SceneOf : public Scene {
public:
    using Scene::Scene;

    void visit(const float *energy, int64_t pixels, const std::vector<const float *> &features,
               float *prob) override {
        std::vector<Kernel> kernels(features.size());  // one field reads and fills them together
        std::vector<Share> shares = place(pixels, features);
        if (pass == Pass::touch) return;
        if (pass == Pass::ones) return splat_ones_of(shares);
        for (size_t m = 0; m < shares.size(); ++m)
            normalise(shares[m].kernel, shares[m].slice(shared[m]->ones, team), team);
        if (pass == Pass::mass) return splat_ones_of(shares);
        std::vector<std::vector<float>> masses;
        if (pass == Pass::step)
            for (size_t m = 0; m < shares.size(); ++m)
                masses.push_back(shares[m].slice(shared[m]->mass, team));
        for (size_t m = 0; m < shares.size(); ++m) {
            if (pass == Pass::step)
                shares[m].template pull<V>(shared[m]->kernel.values, width, team);
            else
                shares[m].kernel.widen(width);
            kernels[m] = std::move(shares[m].kernel);
        }
        MeanField<V> field(energy, classes, width, kernels, team);
        for (size_t m = 0; m < masses.size(); ++m)
            field.add_constant(masses[m], shared[m]->kernel.constant);
        field.update(pass == Pass::step, prob);
        if (prob) return;
        for (size_t m = 0; m < shares.size(); ++m) {
            shares[m].kernel = std::move(kernels[m]);
            shares[m].template push<V>(*shared[m], width, team);
        }
    }

protected:
    void blur(Kernel &kernel) override {
        const Rows<V> rows{width};
        rows.with_compatibility(kernel, [&](auto finish) { rows.filter(kernel, team, finish); });
    }

private:
    std::vector<Share> place(int64_t pixels, const std::vector<const float *> &features) {
        std::vector<Share> shares(features.size());
        for (size_t m = 0; m < features.size(); ++m) {
            Plan &plan = shares[m].kernel.plan;
            plan.d = shared[m]->packing.d;
            plan.pixels = pixels;
            const auto own = plan.place<Wide>(features[m], shared[m]->packing, team);
            for (const Wide key : own.keys())
                shares[m].rows.push_back(1 + shared[m]->numbering.number(key));
        }
        return shares;
    }

    void splat_ones_of(std::vector<Share> &shares) {
        for (size_t m = 0; m < shares.size(); ++m) {
            shares[m].kernel.widen(1);
            splat_ones(shares[m].kernel, team);
            shares[m].push<1>(*shared[m], 1, team);
        }
    }
};

}  // namespace terravox
