// The one utility order: what a bundle is worth, for eviction and for prefetch alike. The pager and the simulator both ask
// this class, so a replayed trace decides as a run does.
//
// A bundle's value is the number of its uses by the coming tokens, those farther off discounted. It is read from a table that
// the policy fills while it runs: what became of bundles that stood as this one stands now, in two features (tokens since the
// last use, decayed share of tokens that used it). The features are those of LRFU (Lee et al., IEEE Trans. Computers 50(12),
// 2001), the table is LHD's idea (Beckmann, Chen, Cidon: LHD, NSDI 2018), and it is learned by temporal differences (Sutton,
// Machine Learning 3, 1988): so no weight between recency and frequency is fixed, the model's own routing sets it. One table
// serves all layers, so experts of layers with and without a habit compare. Its first guess, that things go on as they went,
// makes it LRFU for the first tokens.
//
// A bundle's worth is its value times how near its layer's next turn is. Layers take turns in a circle: of two bundles with the
// same value, the one whose layer was just computed holds its place longest before it can be of use.
//
// Not thread-safe: the pager calls it under its mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace spac {

class Policy {
  public:
    // Of a ubatch only the last tokens say what comes next: a long prompt counts no more than this many decoded tokens.
    static constexpr int ubatch_tokens = 32;

    struct Victim {
        int    layer  = -1;  // -1: none
        int    expert = -1;
        double worth  = std::numeric_limits<double>::infinity();
    };

    explicit Policy(const std::vector<int> & n_experts);  // [layer]; layers are numbered 0, 1, 2 ... as they are computed

    // The layer begins to be computed: distances count from here.
    void begin(int layer) { current_ = layer; }
    // A token chose these experts in the layer. Numbers that are no expert's are ignored. learn: false for what was used at
    // some time, not by the very next token.
    void use(int layer, const int32_t * experts, int n, bool learn = true);
    void end_turn(int layer);  // of a ubatch: values are right from here on
    // A ubatch's tokens chose at(token, i) in the layer, i < n_used: experts, all together. Only its last tokens count one by
    // one, what earlier ones used counts as one use before them.
    template <typename F> void use_ubatch(int layer, const std::vector<int32_t> & experts, int64_t n_tokens, int n_used, F && at) {
        const int64_t first = n_tokens > ubatch_tokens ? n_tokens - ubatch_tokens : 0;
        if (first > 0) {
            use(layer, experts.data(), (int) experts.size(), false);
        }
        std::vector<int32_t> chosen((size_t) n_used);
        for (int64_t token = first; token < n_tokens; ++token) {
            for (int i = 0; i < n_used; ++i) {
                chosen[(size_t) i] = at(token, i);
            }
            use(layer, chosen.data(), n_used, first == 0 || token > first);
        }
        end_turn(layer);
    }
    // Somebody else says that the layer's next token uses it with at least this probability; that holds until that token has come.
    void expect(int layer, int expert, double chance);
    // Somebody else knows coming tokens. All are for [expert]:
    //   now    probability that the next ubatch uses it in this layer
    //   later  the same of the tokens known after it, each as the first use, discounted by their distance, summed
    //   rest   the weight that the policy's own value has beside them
    // The value is then now + (1 - now) * step_discount * (later + rest * own), from the layer's next turn on later + rest * own,
    // and from the one after that the policy's own again.
    void foresee(int layer, const float * now, const float * later, const float * rest);
    static constexpr float step_discount = 0.7f;  // of a known use one turn later
    void set_present(int layer, int expert, bool present);

    double value(int layer, int expert) const { return layers_[layer].value[expert]; }
    double worth(int layer, int expert) const { return value(layer, expert) * nearness(layer); }

    // The present bundle of least worth among those that evictable(layer, expert) admits, in one layer or in all (-1). It
    // skips layers whose cheapest present bundle is worth more than what was found already.
    template <typename F> Victim cheapest(F && evictable, int only_layer = -1) {
        Victim victim;
        const int first = only_layer < 0 ? 0 : only_layer, last = only_layer < 0 ? (int) layers_.size() : only_layer + 1;
        for (int layer = first; layer < last; ++layer) {
            Layer & l = layers_[layer];
            const double near = nearness(layer);
            if (least_present(l) * near >= victim.worth) {
                continue;
            }
            for (int expert = 0; expert < (int) l.value.size(); ++expert) {
                const double worth = l.value[expert] * near;
                if (worth < victim.worth && l.present[expert] && evictable(layer, expert)) {
                    victim = { layer, expert, worth };
                }
            }
        }
        return victim;
    }

  private:
    struct Layer {
        std::vector<float>    share;          // of tokens that used the expert, decayed
        std::vector<uint32_t> idle_tokens;    // since the last use
        std::vector<uint16_t> cell;
        std::vector<float>    own, value;     // own: without what others foresee
        std::vector<float>    now, later, rest;
        int                   foreseen = 0;   // 2: the next token and later ones, 1: later ones
        std::vector<uint8_t>  present, used;  // used: scratch of use()
        float                 least = 0;      // smallest value of those present; negative: not known
    };
    struct Cell {
        float value, tokens;  // of bundles that stood here: what they were worth, over so many tokens
    };

    double nearness(int layer) const {
        const int n = (int) layers_.size();
        return nearness_[(layer - current_ - 1 + n) % n];
    }
    static float least_present(Layer & layer);
    void         place(Layer & layer, size_t expert);  // into its cell
    static void  appraise(Layer & layer);              // all of its values

    std::vector<Layer> layers_;
    std::vector<Cell>  cells_;
    std::vector<float> nearness_;  // [layers until the next turn - 1]: the fewer, the larger
    int                current_ = 0;
};

}  // namespace spac
