// The camera of the phone or computer that shows this page. Its pictures are sent to the device and nowhere else.
import { request } from "./api.js";
import { attempt, current, OWN, set } from "./store.js";
import { useEffect, useRef, useState } from "./vendor.js";

const SIDE = 640; // longest side of the pictures that are sent, in pixels
const BETWEEN = 600; // ms between two questions

/** Return why a browser gives no camera to this page; empty if it does. */
export function missing() {
  if (navigator.mediaDevices?.getUserMedia) return "";
  if (window.isSecureContext) return "This browser has no access to a camera.";
  return (
    "Browsers open their camera only for pages with https:// (or on the device itself). This page came without it: " +
    "start the service with a certificate, or take photographs with the button “Choose pictures” below."
  );
}

/** Open the camera while `on` is true. Returns {video: ref, problem, running, grab}. */
export function useOwnCamera(on) {
  const video = useRef();
  const [problem, setProblem] = useState("");
  const [running, setRunning] = useState(false);

  const grab = useRef(async () => {
    const { videoWidth: width, videoHeight: height } = video.current ?? {};
    if (!width) return null;
    const scale = Math.min(1, SIDE / Math.max(width, height));
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    canvas.getContext("2d").drawImage(video.current, 0, 0, canvas.width, canvas.height);
    return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  }).current;

  useEffect(() => {
    if (!on || missing()) return undefined;
    let stream = null;
    let wanted = true;
    navigator.mediaDevices
      .getUserMedia({ video: { facingMode: { ideal: "environment" }, width: { ideal: 1280 } }, audio: false })
      .then(async (opened) => {
        stream = opened;
        if (!wanted) return stop();
        setProblem("");
        video.current.srcObject = opened;
        await video.current.play();
        setRunning(true);
        return undefined;
      })
      .catch((error) => setProblem(reason(error)));
    const stop = () => stream?.getTracks().forEach((track) => track.stop());
    return () => {
      wanted = false;
      stop();
      setRunning(false);
    };
  }, [on]);

  useEffect(() => {
    if (!running) return undefined;
    let wanted = true;
    (async () => {
      while (wanted) {
        const next = new Promise((done) => setTimeout(done, BETWEEN));
        if (!document.hidden && current().teach.phase !== "collecting") await ask(await grab());
        await next;
      }
    })();
    return () => {
      wanted = false;
    };
  }, [running]);

  return { video, problem: on ? missing() || problem : "", running, grab };
}

async function ask(picture) {
  if (!picture || !current().classes?.length) return;
  const begun = performance.now();
  const answer = await attempt(() => request("POST", "v1/predict", { body: picture, type: "image/jpeg" }));
  if (!answer) return;
  const latency_ms = Math.round(performance.now() - begun);
  set({ answers: { ...current().answers, [OWN]: { ...answer.predictions[0], latency_ms } } });
}

function reason(error) {
  if (error.name === "NotAllowedError") return "The browser was not allowed to use the camera. Allow it in the address bar.";
  if (error.name === "NotFoundError") return "No camera was found on this phone or computer.";
  return `The camera cannot be opened: ${error.message}`;
}
