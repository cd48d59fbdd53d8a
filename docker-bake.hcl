// docker buildx bake [gpu | cpu]. Set variables in the environment: IMAGE=user/worker TAG=0.1.0 docker buildx bake gpu
variable "IMAGE" { default = "runpod-vllm-worker" }
variable "TAG" { default = "dev" }
variable "VLLM_REPOSITORY" { default = "vllm/vllm-openai" }
variable "VLLM_TAG" { default = "v0.32.0" }
variable "MODEL_NAME" { default = "" }
variable "MODEL_REVISION" { default = "" }
variable "REVISION" { default = "unknown" }

group "default" { targets = ["gpu"] }

target "gpu" {
  target    = "gpu"
  platforms = ["linux/amd64"]
  tags      = ["${IMAGE}:${TAG}"]
  args = {
    VLLM_REPOSITORY = VLLM_REPOSITORY
    VLLM_TAG        = VLLM_TAG
    MODEL_NAME      = MODEL_NAME
    MODEL_REVISION  = MODEL_REVISION
    VERSION         = TAG
    REVISION        = REVISION
  }
  // The token for a gated model, from the environment. No layer contains it.
  secret = ["type=env,id=HF_TOKEN"]
}

target "cpu" {
  target    = "cpu"
  platforms = ["linux/amd64"]
  tags      = ["${IMAGE}:${TAG}-cpu"]
}
