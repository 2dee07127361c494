/**
 * LineAR Doctor shows its report on the node: a text that can be selected, and is not saved with the workflow.
 */

// @ts-ignore -- ComfyUI serves these
import { app } from "../../scripts/app.js";

const LEAST = 220; // pixels

app.registerExtension({
  name: "linear_ar.doctor",

  /** @param {any} node */
  nodeCreated(node) {
    if (node.comfyClass !== "LineAR_Doctor") return;
    const text = document.createElement("textarea");
    text.readOnly = true;
    text.placeholder = "Press Run.";
    text.className = "comfy-multiline-input";
    text.style.fontFamily = "monospace";
    node.addDOMWidget("shown", "LINEAR_REPORT", text, { serialize: false, getMinHeight: () => LEAST, hideOnZoom: false });
    node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], LEAST + 60)]);
    const before = node.onExecuted;
    node.onExecuted = function (/** @type {any} */ output) {
      before?.call(this, output);
      text.value = (output?.text ?? []).join("\n");
    };
  },
});
