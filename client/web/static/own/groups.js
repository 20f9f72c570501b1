// Charts of a page, each with the metrics that it shows.

const DIVERGENCE = /^train\/(alm_)?(forward_kl|reverse_kl|jsd|jsd_normalised|tvd|skew_kl|skew_reverse_kl|alpha_beta|adaptive_kl|mse)$/;
const among = (...names) => (key) => names.includes(key);

export const GROUPS = [
  { title: "Loss", unit: "nats per token", takes: among("train/loss", "train/cross_entropy", "eval/cross_entropy") },
  { title: "KL and other divergences", unit: "nats per token", takes: (key) => DIVERGENCE.test(key) || key === "eval/kl" },
  { title: "Agreement with the teacher", unit: "share", takes: among("eval/agreement", "eval/acceptance", "eval/accuracy", "train/rollout_overlap") },
  { title: "Learning rate", unit: "", takes: among("train/learning_rate") },
  { title: "Speed", unit: "tokens per second", takes: among("train/tokens_per_second") },
  { title: "Waiting for the teacher", unit: "seconds per step", takes: among("train/teacher_wait_s", "train/step_time_s") },
];
