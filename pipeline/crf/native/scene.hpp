// One lattice under all tiles of a scene, so that a tiling does not change the result.
//
// Tiles keep tables of their own for the vertices that their pixels touch. What they add is merged
// by key, in the order of the tiles, blurred once over the whole scene, and handed back. A tile is
// gone through once for each pass: touch, ones, mass, start, and a step for each iteration.
#pragma once

#include "mean_field.hpp"

namespace terravox {

// A kernel over the whole scene. Its packing must hold for every tile, so it comes from bounds.
struct Shared {
    Packing packing;
    Numbering<Wide> numbering;
    Kernel kernel;
    std::vector<float> constant;

    Shared(const std::vector<float> &low, const std::vector<float> &high) {
        const auto scale = scales(int(low.size()));
        std::vector<float> least(low), most(high);
        for (size_t k = 0; k < low.size(); ++k) least[k] *= scale[k], most[k] *= scale[k];
        packing = Packing::of(least, most);
        kernel.plan.d = packing.d;
    }
};

class AnyTile {
public:
    virtual ~AnyTile() = default;
    virtual void splat_ones() = 0;     // into the shared sums
    virtual void normalise() = 0;      // by the blurred ones
    virtual void take_mass() = 0;      // the blurred ones, once they were splatted normalised
    virtual void start() = 0;          // splats softmax(-energy)
    virtual void step(float *prob) = 0;  // slices, and splats again or writes to prob
};

class Scene {
public:
    Scene(int classes, int width, int threads) : team(threads), classes(classes), width(width) {}

    Team team;
    int classes, width;
    std::vector<std::unique_ptr<Shared>> shared;

    // After all tiles have touched: their vertices' neighbours.
    void link() {
        for (auto &one : shared) one->kernel.plan.link(one->numbering, one->packing, team);
    }

    void widen(int values) {
        for (auto &one : shared) one->kernel.widen(values);
    }

    void blur_ones() {
        for (auto &one : shared) {
            const float gain = one->kernel.plan.gain();
            Rows<1>{1}.filter(one->kernel, team, [gain](float *row) { *row *= gain; });
        }
    }

    virtual ~Scene() = default;
    virtual void blur() = 0;
    virtual std::unique_ptr<AnyTile> tile(const float *energy, int64_t pixels,
                                          const std::vector<const float *> &features) = 0;
};

template <int V> class Tile : public AnyTile {
public:
    Tile(Scene &scene, const float *energy, int64_t pixels,
         const std::vector<const float *> &features)
        : scene_(scene), kernels_(features.size()), rows_(features.size()) {
        for (size_t m = 0; m < features.size(); ++m) {
            Shared &shared = *scene.shared[m];
            Plan &plan = kernels_[m].plan;
            plan.d = shared.packing.d;
            plan.pixels = pixels;
            const auto own = plan.place<Wide>(features[m], shared.packing, scene.team);
            for (const Wide key : own.keys()) rows_[m].push_back(1 + shared.numbering.number(key));
        }
        field_ = std::make_unique<MeanField<V>>(energy, scene.classes, scene.width, kernels_,
                                                scene.team);
    }

    void splat_ones() override {
        for (size_t m = 0; m < kernels_.size(); ++m) {
            kernels_[m].widen(1);
            terravox::splat_ones(kernels_[m], scene_.team);
            push<1>(m, 1);
        }
    }

    void normalise() override {
        for (size_t m = 0; m < kernels_.size(); ++m)
            terravox::normalise(kernels_[m], sliced_ones(m), scene_.team);
    }

    void take_mass() override {
        for (size_t m = 0; m < kernels_.size(); ++m) masses_.push_back(sliced_ones(m));
    }

    void start() override {
        for (auto &kernel : kernels_) kernel.widen(scene_.width);
        field_->update(false, nullptr);
        for (size_t m = 0; m < kernels_.size(); ++m) {
            field_->add_constant(masses_[m], scene_.shared[m]->constant);
            push<V>(m, scene_.width);
        }
    }

    void step(float *prob) override {
        for (size_t m = 0; m < kernels_.size(); ++m) pull<V>(m, scene_.width);
        field_->update(true, prob);
        if (prob) return;
        for (size_t m = 0; m < kernels_.size(); ++m) push<V>(m, scene_.width);
    }

private:
    // The tile's sums are added to the scene's. Tiles do so one after another, in their order.
    template <int W> void push(size_t m, int width) {
        const Rows<W> table{width};
        Kernel &own = kernels_[m];
        table.gather(own, scene_.team);
        float *sums = scene_.shared[m]->kernel.sums.data();
        for (size_t i = 0; i < rows_[m].size(); ++i)
            table.add(sums + int64_t(rows_[m][i]) * width, &own.sums[(1 + i) * width], 1.0f);
        std::fill(own.sums.begin(), own.sums.end(), 0.0f);
    }

    template <int W> void pull(size_t m, int width) {
        const float *values = scene_.shared[m]->kernel.values.data();
        for (size_t i = 0; i < rows_[m].size(); ++i)
            std::copy_n(values + int64_t(rows_[m][i]) * width, width,
                        &kernels_[m].values[(1 + i) * width]);
        Rows<W>{width}.spread(kernels_[m], scene_.team);
    }

    std::vector<float> sliced_ones(size_t m) {
        pull<1>(m, 1);
        return slice_ones(kernels_[m], scene_.team);
    }

    Scene &scene_;
    std::vector<Kernel> kernels_;
    std::vector<std::vector<int32_t>> rows_;  // in the scene's table, of each of the tile's vertices
    std::vector<std::vector<float>> masses_;
    std::unique_ptr<MeanField<V>> field_;
};

template <int V> class SceneOf : public Scene {
public:
    using Scene::Scene;

    void blur() override {
        const Rows<V> rows{width};
        for (auto &one : shared)
            rows.with_compatibility(
                one->kernel, [&](auto finish) { rows.filter(one->kernel, team, finish); });
    }

    std::unique_ptr<AnyTile> tile(const float *energy, int64_t pixels,
                                  const std::vector<const float *> &features) override {
        return std::make_unique<Tile<V>>(*this, energy, pixels, features);
    }
};

}  // namespace terravox
